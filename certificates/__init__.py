"""Certificates: proof, on the production code, that what is emitted follows the target's law."""
