"""Everything about faces that is neither method's own: files, alignment, data sets, training runs, verification."""
