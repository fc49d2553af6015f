"""All campaigns by name, in the order in which they are run."""

from torture import configurations, cost, cuts, damage, faults, hostile, ranks, selfcheck, sharding, signals
from torture.campaign import Campaign

_ALL = [
    cuts.CAMPAIGN,
    faults.CALLS,
    faults.KILLS,
    damage.CAMPAIGN,
    configurations.CAMPAIGN,
    hostile.CAMPAIGN,
    signals.CAMPAIGN,
    ranks.CAMPAIGN,
    sharding.CAMPAIGN,
    cost.CAMPAIGN,
]
CAMPAIGNS: dict[str, Campaign] = {campaign.name: campaign for campaign in _ALL}
#: Run only by name: its cases fail on purpose.
NAMED: dict[str, Campaign] = {selfcheck.CAMPAIGN.name: selfcheck.CAMPAIGN}
