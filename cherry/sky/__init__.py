"""SkyPilot: a training job as a task for clouds and Kubernetes."""
