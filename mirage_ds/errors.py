"""What a user can cause and mend. `main` prints such an error once, without a traceback, and exits with code 2.

Every message has four parts: what is wrong, where, what is allowed, what to do.
"""


class MirageError(Exception):
    """Base of every error that a user can mend; anything else is a bug and keeps its traceback."""


class ConfigError(MirageError):
    """A recipe, an override, a DeepSpeed JSON or a model folder that cannot be used as it is."""


class DataError(MirageError):
    """A row, an image, a shard or a manifest that cannot be read or does not fit together."""


class CheckpointError(MirageError):
    """A checkpoint that is missing, incomplete, or belongs to another model or run."""
