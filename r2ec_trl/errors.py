"""The one exception for mistakes a user can mend."""


class UserError(ValueError):
    """A user's mistake, said in one sentence: what is wrong, where (file, row, value), how to mend it.

    Recipes print the sentence and exit with status 2; anything else is a bug and keeps its traceback.
    """
