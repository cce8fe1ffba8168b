"""The one exception class of the library."""


class IrpeError(ValueError):
    """Every wrong use of irpe; the message repeats the input and says what would work."""
