"""For loops that other libraries own; each module needs the library it is named after."""
