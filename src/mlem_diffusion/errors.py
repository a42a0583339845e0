"""The one exception meant for people, and the one warning: their texts are sentences."""


class UserError(Exception):
    """Bad input or a missing artefact; scripts print the text alone and exit with status 2."""


class SlowPath(UserWarning):
    """Something fast did not work and the slow way is taken; the text says what and why in one sentence."""
