"""Weights: their layouts (``layouts``), files (``io``), downloads (``download``) and names (``zoo``)."""
