"""Workers that decode with other libraries, each a script for an environment of its own; see `docs/benchmark.md`."""
