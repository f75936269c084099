"""Certificates: proof, on the production code, that what is emitted follows the target's law."""

from specdec.certificates.certify import Certificate, certify

__all__ = ["Certificate", "certify"]
