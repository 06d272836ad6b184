"""Where the bytes of a checkpoint come from: a folder, or objects in S3 of which a folder mirrors the small ones.

Knows nothing of what is in the files; `platform.checkpoints` reads them through the one interface `files.Files`, which
`mirror.open_files` gives for a folder. `mirror.mirror` makes the folder for a place in S3, `whole.download` completes
it, `push.push` uploads. Import the modules: the configuration needs `s3_location` and none of boto3.
"""
