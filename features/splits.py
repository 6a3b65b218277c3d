"""The protocol's splits and the cold subset, as SQL over the canonical tables.

Leave-one-out by position: a user's last interaction is ``test``, the one before ``validation``,
all others ``train``. Users with fewer than three interactions are trained on and never evaluated,
because one of the three parts would be empty. The input of ``test`` includes the validation item.

Cold items have fewer than ``COLD_BELOW`` training interactions; what validation and test hold does
not count, or the choice of the items would see the answers.
"""

MIN_EVALUATED = 3
COLD_BELOW = 10


def split_sql(interactions: str) -> str:
    """Give ``interactions`` (a table, view or subquery) one more column, ``split``."""
    return f"""
        SELECT *, CASE
            WHEN n < {MIN_EVALUATED} OR position < n - 2 THEN 'train'
            WHEN position = n - 2 THEN 'validation'
            ELSE 'test' END AS split
        FROM (SELECT *, count(*) OVER (PARTITION BY user) AS n FROM {interactions})
    """


def train_counts_sql(interactions: str, items: str) -> str:
    """Training interactions of every item, also of those that have none: (item, train_count)."""
    return f"""
        SELECT i.item, count(s.item) AS train_count
        FROM {items} i
        LEFT JOIN (SELECT item FROM ({split_sql(interactions)}) WHERE split = 'train') s
        ON s.item = i.item
        GROUP BY i.item
    """


def cold_sql(interactions: str, items: str) -> str:
    """The cold-start subset: held-out interactions whose item is cold.

    Each row (user, item, position, split) stands for the user's sequence cut so that it ends in
    this cold item. Only held-out positions are used: a cold item at a training position has been
    a training target, and to rank it again would measure memory.
    """
    return f"""
        SELECT s.user, s.item, s.position, s.split
        FROM ({split_sql(interactions)}) s
        JOIN ({train_counts_sql(interactions, items)}) c ON c.item = s.item
        WHERE s.split <> 'train' AND c.train_count < {COLD_BELOW}
    """
