"""What a run would cost on other machines than this one."""
