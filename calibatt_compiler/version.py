"""The version of the package, as recorded in what it writes."""

VERSION = "0.1.0"
PRODUCER = f"calibatt {VERSION}"
