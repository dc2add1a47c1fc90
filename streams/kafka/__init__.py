"""How we speak with Kafka, and what we change in Faust and aiokafka."""
