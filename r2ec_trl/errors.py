"""The one exception for mistakes a user can mend, and what another exception says in a line."""


class UserError(ValueError):
    """A user's mistake, said in one sentence: what is wrong, where (file, row, value), how to mend it.

    Recipes print the sentence and exit with status 2; anything else is a bug and keeps its traceback.
    """


def first_line(error: BaseException) -> str:
    """The first line of what an exception says; its kind where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
