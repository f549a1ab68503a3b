"""Frequent itemsets from their definitions, with Python sets."""


def frequent(transactions, support):
    """{itemset: support}: a subset of a frequent set is frequent, so each is tried with each later item."""
    holders = {}
    for i, transaction in enumerate(transactions):
        for item in transaction:
            holders.setdefault(item, set()).add(i)
    singles = {(item,): where for item, where in sorted(holders.items()) if len(where) >= support}
    found, longest = dict(singles), singles
    while longest:
        tried = {
            (*items, item): where & others
            for items, where in longest.items()
            for (item,), others in singles.items()
            if item > items[-1]
        }
        longest = {items: where for items, where in tried.items() if len(where) >= support}
        found |= longest
    return {items: len(where) for items, where in found.items()}


def naive_itemsets(transactions, support, kind):
    """{itemset: support} of the frequent sets of a kind."""
    supports = {frozenset(items): count for items, count in frequent(transactions, support).items()}
    supersets = {items: [t for t in supports if items < t] for items in supports}
    keep = {
        "all": lambda s: True,
        "closed": lambda s: all(supports[t] < supports[s] for t in supersets[s]),
        "maximal": lambda s: not supersets[s],
    }[kind]
    return {tuple(sorted(s)): count for s, count in supports.items() if keep(s)}


def support_of(items, transactions):
    """Transactions that hold all of `items`."""
    return sum(set(items) <= set(transaction) for transaction in transactions)
