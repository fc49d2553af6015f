"""All campaigns by name, in the order in which they are run."""

from torture import configurations, cost, cuts, damage, faults, hostile, ranks, sharding, signals
from torture.campaign import Campaign

_ALL = [cuts.CAMPAIGN, faults.CALLS, faults.KILLS, damage.CAMPAIGN, configurations.CAMPAIGN, hostile.CAMPAIGN, signals.CAMPAIGN, ranks.CAMPAIGN, sharding.CAMPAIGN, cost.CAMPAIGN]
CAMPAIGNS: dict[str, Campaign] = {campaign.name: campaign for campaign in _ALL}
