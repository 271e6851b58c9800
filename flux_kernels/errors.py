"""The three errors a user can meet; every message says what was got, what is legal and what to do."""


class GGUFError(ValueError):
    """Report a GGUF file that cannot be read, or a model that cannot be written as one."""


class FormatError(ValueError):
    """Report a block format, shape or dtype that an operation cannot take."""


class BackendUnavailable(RuntimeError):
    """Report a backend or compute mode that was named but cannot run here."""
