"""The one exception class of the library."""


class IrpeError(ValueError):
    """Raised for wrong use of irpe. The message repeats the input and states what is valid."""
