"""Everything about faces that belongs to neither method: data, training, evaluation, and faster kernels for CPUs."""
