"""The errors a user can cause. Each message names the thing, what was found and what was expected."""


class ExaoneError(Exception):
    """Base of every error that this package raises about its input. The CLI prints it and exits with `exit_code`."""

    exit_code = 2


class ConfigError(ExaoneError, ValueError):
    """A model or run configuration is wrong."""


class CheckpointError(ExaoneError, ValueError):
    """A checkpoint on disk is malformed, incomplete or does not match its configuration."""


class InputError(ExaoneError, ValueError):
    """A request (prompt, token ids, sampling parameters, shapes) is wrong."""


class TooLongError(InputError):
    """A text has more tokens than there is use for."""


class StorageError(ExaoneError, OSError):
    """The machine could not store what was asked for: no space, no permission, an output that exists."""

    exit_code = 3
