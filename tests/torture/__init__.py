"""The long campaigns behind the guarantees of docs/reliability.md: ``make torture``.

Each campaign is a module with a `torture.campaign.Campaign`; `tests/test_torture.py` runs a few cases of each.
"""
