"""The controller: who is a member, what each shard holds, how loaded the experts are."""
