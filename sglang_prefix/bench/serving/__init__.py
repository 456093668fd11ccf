"""`bench serving`: servers under the same loads."""
