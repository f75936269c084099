"""Moving the keys and values of accepted paths to their positions."""

from specdec.kernels.path_commit.api import path_commit

__all__ = ["path_commit"]
