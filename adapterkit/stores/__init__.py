"""Object stores: what is asked of one, counted, tried again, and told in one sentence when it fails.

S3 is read through obstore and written through boto3, which knows uploads of copied parts; Google is asked by its JSON API with
google-auth's tokens, Azure through its own client. All are in the extra `stores`.
Modules: `meter` (what was moved), `faults` (what an answer means), `store` (what every store does), `objects` (what obstore
does), `s3`, `http` and `gcs`, `azure`, `connect` (credentials and endpoints, which stay there).
"""
