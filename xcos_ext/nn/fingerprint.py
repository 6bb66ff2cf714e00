"""The old home of :mod:`xcos_ext.fingerprint`."""

from xcos_ext.fingerprint import fingerprint_state, fingerprint_weights

__all__ = ["fingerprint_state", "fingerprint_weights"]
