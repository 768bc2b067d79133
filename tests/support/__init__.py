"""What test modules share: small models, stages, oracles and worlds. Fixtures are in conftest.py."""
