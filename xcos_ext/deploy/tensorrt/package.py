"""The tensorrt package: found, old enough to be known, and its messages kept."""

from __future__ import annotations

import logging
import re
from collections import deque
from typing import Any, cast

from xcos_ext.io.errors import ModelError, XCosError
from xcos_ext.io.optional import MissingPackageError, need

from .api import EnumMember, TensorRT

__all__ = ["OLDEST", "EngineError", "Log", "TensorRTError", "load_tensorrt", "log_of", "version_of"]

#: The first version that has everything used here.
OLDEST = (10, 3)

_MOST_MESSAGES = 20
_MESSAGE_LENGTH = 300

#: TensorRT's own messages go to this logger of Python's logging module, which is silent unless set up.
_logging = logging.getLogger("xcos_ext.tensorrt")
_logging.addHandler(logging.NullHandler())


class TensorRTError(XCosError, RuntimeError):
    """TensorRT cannot do its work here: it is too old, there is no GPU, a build failed, or a launch did."""


class EngineError(ModelError):
    """A plan that cannot be used: missing, changed, cut off, or made for another TensorRT or GPU."""


def version_of(text: str) -> tuple[int, ...]:
    """The numbers of a version: ``"10.14.1.48.post1"`` gives (10, 14, 1, 48)."""
    numbers = re.match(r"\d+(?:\.\d+)*", text)
    return tuple(int(part) for part in numbers[0].split(".")) if numbers else ()


def load_tensorrt() -> TensorRT:
    """The module ``tensorrt``, which is imported only now.

    Raises:
        MissingPackageError: it is not installed, or its libraries cannot be loaded.
        TensorRTError: a version that is too old.
    """
    try:
        module = cast(TensorRT, need("tensorrt", "a TensorRT engine", extra="tensorrt"))
    except MissingPackageError:
        raise
    except Exception as error:  # its own start-up, e.g. libraries that do not fit
        raise MissingPackageError(f"a TensorRT engine needs tensorrt, which cannot be loaded ({error})") from error
    version = str(getattr(module, "__version__", ""))
    if version_of(version) < OLDEST:
        raise TensorRTError(f"tensorrt: expected version {OLDEST[0]}.{OLDEST[1]} or later, got {version or 'none'}")
    return module


class Log:
    """TensorRT's messages: all to Python's logging, the last errors kept to explain a failure.

    Attributes:
        logger: the object to give to TensorRT; it has to outlive everything that was made with it.
    """

    def __init__(self, trt: TensorRT) -> None:
        self._trt = trt
        self._errors: deque[tuple[int, str]] = deque(maxlen=_MOST_MESSAGES)
        self._count = 0
        severity = trt.ILogger.Severity
        levels = {
            severity.INTERNAL_ERROR: logging.ERROR,
            severity.ERROR: logging.ERROR,
            severity.WARNING: logging.WARNING,
            severity.INFO: logging.INFO,
        }
        base: Any = trt.ILogger
        keep = self._keep

        class Logger(base):
            def __init__(self) -> None:
                base.__init__(self)  # pybind11 does not accept super()

            def log(self, severity: EnumMember, msg: str) -> None:
                keep(levels.get(severity, logging.DEBUG), msg)

        self.logger = Logger()

    def _keep(self, level: int, message: str) -> None:
        if level >= logging.ERROR:
            self._count += 1
            self._errors.append((self._count, " ".join(message.split())[:_MESSAGE_LENGTH]))
        _logging.log(level, "%s", message)

    def mark(self) -> int:
        """A place in the messages, for :meth:`errors`."""
        return self._count

    def errors(self, since: int = 0) -> str:
        """The last errors after a mark, at most three, in one line; says so where there are none."""
        found = list(dict.fromkeys(text for number, text in tuple(self._errors) if number > since))
        return "; ".join(found[-3:]) or "TensorRT gave no reason"


_logs: dict[int, Log] = {}


def log_of(trt: TensorRT) -> Log:
    """The one log of a process: TensorRT keeps the first logger it meets for everything that follows."""
    log = _logs.get(id(trt))
    if log is None:
        log = _logs[id(trt)] = Log(trt)
    return log
