"""The checker that the import hook of conftest.py puts around every function of the package."""

from beartype import BeartypeConf, beartype

# An int is a float to every type checker and every user: temperature=0 is as good as 0.0.
check = beartype(conf=BeartypeConf(is_pep484_tower=True))
