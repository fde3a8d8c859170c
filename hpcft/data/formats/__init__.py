"""One module per shape of record, each with ``row(record) -> Row``; ``hpcft.catalog.FORMATS`` lists them."""
