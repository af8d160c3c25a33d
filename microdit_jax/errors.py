"""The one exception that users are meant to see."""


class UserError(ValueError):
    """Input that a person can mend: what was expected, what was found, and the fix, in one line.

    Commands turn it into that line on stderr and exit status 2; the library raises it unchanged.
    """

    def __init__(self, message: str):
        super().__init__(" ".join(str(message).split()))
