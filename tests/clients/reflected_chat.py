"""A gRPC client that knows nothing but the reflection service: python reflected_chat.py HOST:PORT

It finds shoal.v1.Chat on a gateway that serves minnow, builds its messages from the descriptors that it gets, and
chats. That is what grpcurl does.
"""

import sys

import grpc
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

CHAT = "shoal.v1.Chat"
QUESTION = "What is 348 + 277?"
ANSWER = "625"


class Service:
    """Calls by name, with messages as dictionaries."""

    def __init__(self, channel, name):
        pool = DescriptorPool(ProtoReflectionDescriptorDatabase(channel))
        self.channel = channel
        self.descriptor = pool.FindServiceByName(name)

    def call(self, name, **fields):
        method = self.descriptor.methods_by_name[name]
        make = self.channel.unary_stream if method.server_streaming else self.channel.unary_unary
        stub = make(
            f"/{self.descriptor.full_name}/{name}",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=GetMessageClass(method.output_type).FromString,
        )
        return stub(GetMessageClass(method.input_type)(**fields), timeout=60)


def main():
    channel = grpc.insecure_channel(sys.argv[1])
    services = set(ProtoReflectionDescriptorDatabase(channel).get_services())
    assert {CHAT, "grpc.health.v1.Health"} <= services, services
    health = health_pb2_grpc.HealthStub(channel)
    for service in ["", CHAT]:
        status = health.Check(health_pb2.HealthCheckRequest(service=service), timeout=60).status
        assert status == health_pb2.HealthCheckResponse.SERVING, (service, status)

    chat = Service(channel, CHAT)
    question = {"messages": [{"role": "user", "content": QUESTION}], "options": {"temperature": 0}}
    plain = chat.call("Chat", **question)
    assert ANSWER in plain.content and plain.reasoning_content and plain.finish_reason == "stop", plain
    assert plain.usage.servers >= 2, plain.usage
    deltas = list(chat.call("ChatStream", **question))
    assert len(deltas) > 3, "no stream"
    assert "".join(delta.content for delta in deltas) == plain.content
    assert "".join(delta.reasoning_content for delta in deltas) == plain.reasoning_content
    assert deltas[-1].finish_reason == "stop" and deltas[-1].usage == plain.usage, deltas[-1]
    [model] = chat.call("Models").models
    assert model.id == plain.model and model.context_max > 0, model

    try:
        chat.call("Chat")
        raise AssertionError("an empty request was answered")
    except grpc.RpcError as error:
        assert error.code() == grpc.StatusCode.INVALID_ARGUMENT, error
        assert dict(error.trailing_metadata())["shoal-param"] == "messages", error
    print("gRPC by reflection: all as it should be")


main()
