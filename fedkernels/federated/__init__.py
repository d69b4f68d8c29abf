"""The engine and its rooms: schedule, local training, evaluators, collectives, client store."""
