"""
From raw sources to a dataset folder; names are loaded on first use.

An importer (`amazon`, `movielens`, `recbole`, `table`) gives a `source`: interactions and items. `pipeline` filters
and orders them (`events`, `item_filter`), splits them (`splits`), cuts the windows (`rows`) and cleans the item text
(`text`). `sequences` reads what is split already. `schema` is the dataset folder; `audit` says what is in one.
"""

from r2ec_trl.moved import imported_when_used

_HOMES = {
    "SPLITS": "schema",
    "ITEMS": "schema",
    "load_dataset_folder": "schema",
    "load_dataset_card": "schema",
    "save_dataset_folder": "schema",
    "validate_dataset": "schema",
    "import_sequences": "sources.sequences",
    "import_amazon": "sources.amazon",
    "import_movielens": "sources.movielens",
    "import_recbole": "sources.recbole",
    "import_table": "sources.table",
    "Source": "sources.source",
    "SplitRule": "splits",
    "Filters": "pipeline",
    "ItemFilter": "item_filter",
    "prepare": "pipeline",
    "audit_dataset": "audit",
    "check_folder": "audit",
    "cut_dataset": "cut",
    "prompt_lengths": "..policy.prompt_lengths",  # its old name: a room above
}
__all__ = list(_HOMES)
__getattr__ = imported_when_used(__name__, _HOMES)
