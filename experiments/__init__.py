"""Entry points; Hydra ends here."""
