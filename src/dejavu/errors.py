"""The errors a user can cause. Every message says what was expected, what was found and what to do."""


class DejavuError(Exception):
    """Base of every error that dejavu raises on bad input."""


class ConfigError(DejavuError, ValueError):
    """A setting, a flag or a request is out of range, unknown or contradicts another."""


class CheckpointError(DejavuError):
    """A checkpoint is missing, damaged, incomplete or of an unsupported kind."""


class PackError(DejavuError):
    """A sparsity pack is missing, damaged or made for other weights."""


class KernelUnavailable(DejavuError):
    """An explicitly chosen backend, instruction set or data type cannot run on this machine."""


class NotFiniteError(DejavuError):
    """A layer gave NaN or infinity: its weights are damaged, or its numbers too large for their data type."""


class CapacityError(DejavuError):
    """A request does not fit: more tokens, rows or selected units than there is room for."""
