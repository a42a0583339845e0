"""The one exception meant for people: its text is a sentence that says what is wrong and what to do."""


class UserError(Exception):
    """Bad input or a missing artefact; scripts print the text alone and exit with status 2."""
