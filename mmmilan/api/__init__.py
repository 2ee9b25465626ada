"""The public functions, which :mod:`mmmilan` itself exports."""
