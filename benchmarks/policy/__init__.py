"""The scheduler's constants, each judged on the same loads in computed time: exact where a clock would be noise."""
