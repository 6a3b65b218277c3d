"""The protocol's splits and the cold subset, as SQL over the canonical tables.

Leave-one-out by position: a user's last interaction is ``test``, the one before ``validation``,
all others ``train``. Users with fewer than three interactions are trained on and never evaluated,
because one of the three splits would be empty. The input of ``test`` includes the validation item.

Cold items have fewer than ``COLD_BELOW`` training interactions. Interactions of validation and test
do not count: otherwise the choice of the items would depend on the targets.
"""

MIN_EVALUATED = 3
COLD_BELOW = 10


def split_sql(interactions: str) -> str:
    """Return a query that adds the column ``split`` to a table, view or subquery."""
    return f"""
        SELECT *, CASE
            WHEN n < {MIN_EVALUATED} OR position < n - 2 THEN 'train'
            WHEN position = n - 2 THEN 'validation'
            ELSE 'test' END AS split
        FROM (SELECT *, count(*) OVER (PARTITION BY user) AS n FROM {interactions})
    """


def train_counts_sql(interactions: str, items: str) -> str:
    """Return a query of (item, train_count), for every item, also those without interactions."""
    return f"""
        SELECT i.item, count(s.item) AS train_count
        FROM {items} i
        LEFT JOIN (SELECT item FROM ({split_sql(interactions)}) WHERE split = 'train') s
        ON s.item = i.item
        GROUP BY i.item
    """


def cold_sql(interactions: str, items: str) -> str:
    """Return a query of the cold-start subset: held-out interactions whose item is cold.

    Each row (user, item, position, split) is the user's sequence up to this cold item. Only
    held-out positions are used: a cold item at a training position has been a training target, and
    ranking it again would measure memorisation.
    """
    return f"""
        SELECT s.user, s.item, s.position, s.split
        FROM ({split_sql(interactions)}) s
        JOIN ({train_counts_sql(interactions, items)}) c ON c.item = s.item
        WHERE s.split <> 'train' AND c.train_count < {COLD_BELOW}
    """
