"""The plain twin of filters, splits and windows: dictionaries and loops, what the fast path must agree with."""

from collections import Counter, defaultdict


def core(rows, least):
    """Rows (user, item, rating, time) after removing rare users and items until none is left."""
    while True:
        users, items = Counter(row[0] for row in rows), Counter(row[1] for row in rows)
        left = [row for row in rows if users[row[0]] >= least and items[row[1]] >= least]
        if len(left) == len(rows):
            return rows
        rows = left


def split(rows, rule, min_history=1, max_history=20, ratio=(0.8, 0.1, 0.1)):
    """From split to a list of (user, history, target, time), for rows whose times differ within a user."""
    by_user = defaultdict(list)
    for user, item, _, time in rows:
        by_user[user].append((time, item))
    examples = []  # (time, user, position from the end, history, target)
    for user, events in sorted(by_user.items()):
        events.sort()
        for at in range(min_history, len(events)):
            history = [item for _, item in events[max(0, at - max_history) : at]]
            examples.append((events[at][0], user, len(events) - 1 - at, history, events[at][1]))
    if rule == "leave_one_out":
        name = {0: "test", 1: "validation"}
        labels = [name.get(example[2], "train") for example in examples]
    else:
        examples.sort(key=lambda example: example[0])
        first, second = int(len(examples) * ratio[0]), int(len(examples) * (ratio[0] + ratio[1]))
        labels = ["train" if at < first else "validation" if at < second else "test" for at in range(len(examples))]
    found = {"train": [], "validation": [], "test": []}
    for label, (time, user, _, history, target) in zip(labels, examples):
        found[label].append((user, history, target, time))
    return {label: sorted(part, key=lambda row: (row[0], row[3])) for label, part in found.items()}
