"""`sample.batch`: the same questions by the Batch API, at half the price and within a day.

new questions -> ledger -> upload -> create -> a look now and then -> download -> journal -> DuckDB, and to the caller

https://platform.openai.com/docs/guides/batch
"""
