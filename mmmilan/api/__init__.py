"""What a person calls; :mod:`mmmilan` itself gives all of it."""
