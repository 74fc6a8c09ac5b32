"""The error tree. A user-facing message always says what to do next."""

from __future__ import annotations

from importlib.util import find_spec


class NitsumError(Exception):
    """Root of every error this project raises on purpose."""


class ConfigError(NitsumError):
    """A flag, a file or the environment is wrong; raised before anything starts."""


class MissingDependency(NitsumError, ImportError):
    """An optional package is needed; the message names the extra that brings it."""


def require_torch() -> None:
    """Packages that compute call this first; `MissingDependency` says how to get PyTorch."""
    if find_spec("torch") is None:
        raise MissingDependency(
            "PyTorch is not installed: install nitsum[cpu] for CPU ranks or nitsum[gpu] for GPUs."
        )


class CheckpointError(NitsumError):
    """A checkpoint cannot be read, or its architecture is not supported."""


class SwitchRefused(NitsumError):
    """A plan switch cannot start: unknown plan, another switch under way, draining."""


class WorkerDied(NitsumError):
    """A worker process ended or stopped answering; its generation is over."""


class ApiError(NitsumError):
    """What a client did wrong or cannot have now, in the shape OpenAI's API gives it."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        type: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.type = type
        self.param = param
        self.code = code
        self.retry_after_s = retry_after_s

    def body(self) -> dict[str, dict[str, str | None]]:
        """The JSON body of the error response."""
        return {
            "error": {
                "message": self.message,
                "type": self.type,
                "param": self.param,
                "code": self.code,
            }
        }


def bad_request(message: str, param: str, code: str | None = None) -> ApiError:
    """A 400 that names the offending field."""
    return ApiError(message, param=param, code=code)
