"""Words for messages: counts with their nouns, shortened lists, names that are safe to print."""


def count_of(number, kind):
    """Return a count and its noun: "1 link" or "2 links" for the kind "link~"."""
    return f"{number:,} {kind.replace('~', '' if number == 1 else 's')}"


def people_count(count):
    """Return "1 person", "2 people" and so on."""
    return f"{count:,} {'person' if count == 1 else 'people'}"


def shorten(items, separator=", ", count=3):
    """Return the first `count` items as text, followed by an ellipsis if there are more."""
    return separator.join(items[:count]) + (f"{separator}..." if len(items) > count else "")


def printable(text):
    """Return text from a file with escapes such as \\x1b for everything that is not a visible character or a space.

    Control characters and changes of direction would let a file rewrite the terminal, and the bytes of a name that are
    not UTF-8 can't be printed.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
