"""The one exception class of the library."""


class IrpeError(ValueError):
    """Raised for every wrong use of irpe; the message repeats the input and says what would work."""
