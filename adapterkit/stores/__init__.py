"""Object stores: what is asked of one, counted, tried again, and told in one sentence when it fails.

Reading needs obstore; writing to S3 also boto3, for parts that the store copies by itself. Both are in the extra `stores`.
Modules: `meter` (what was moved), `faults` (what an answer means), `store` (what every store does), `objects` (any store,
through obstore), `s3` (S3's own uploads), `connect` (credentials and endpoints, which stay there).
"""
