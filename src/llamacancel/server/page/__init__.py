"""The live page: what it is made of, and the endpoints that serve it."""
