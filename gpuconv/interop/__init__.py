"""Arrays of other libraries: taken as they are, without a copy, and answered in kind."""
