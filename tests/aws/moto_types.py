"""Resource types that moto's CloudFormation leaves out, made by moto's own services.

Each resource becomes the API call that CloudFormation would make. Properties have the names of the API's parameters,
botocore checks them against the service's model, and moto's service keeps them. What no service of moto keeps either
(ONLY_CHECKED) is checked against the model and gets a name.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import boto3
from botocore.model import Shape
from botocore.validate import validate_parameters
from moto.cloudformation import models, parsing
from moto.core.common_models import CloudFormationModel
from moto.iam.models import ManagedPolicy

Properties = dict[str, Any]
Made = tuple[str, dict[str, Any]]
"""Physical id, and attributes for GetAtt."""

ONLY_CHECKED = {
    "AWS::ElastiCache::ParameterGroup",
    "AWS::ElastiCache::UserGroup",
    "AWS::FSx::DataRepositoryAssociation",
    "AWS::EC2::PlacementGroup",
}


def install() -> None:
    """Teach moto's CloudFormation these types, for the life of the process. Idempotent."""
    for kind, make in _TYPES.items():
        if kind not in parsing.get_model_map():
            _model(kind, make)
            for cache in (parsing.get_model_list, parsing.get_model_map, parsing.get_name_type_map):
                cache.cache_clear()
    models.ChangeSet.apply = _apply
    ManagedPolicy.delete = _delete_policy


def _apply(self: models.ChangeSet) -> None:
    """moto keeps the outputs of the empty stack that a change set begins with."""
    stack = self.stack
    stack.resource_map.update(self.template_dict, self.parameters)
    stack.parameters = self.parameters
    stack.template_dict = self.template_dict
    stack.output_map = stack._create_output_map()


def _delete_policy(self: ManagedPolicy, account: str, region: str) -> None:
    """moto leaves policies, and then can't delete the roles that have them."""
    client = boto3.client("iam")
    for role in client.list_entities_for_policy(PolicyArn=self.arn)["PolicyRoles"]:
        client.detach_role_policy(RoleName=role["RoleName"], PolicyArn=self.arn)
    client.delete_policy(PolicyArn=self.arn)


def _model(kind: str, make: Callable[[str, Properties], Made]) -> None:
    def create(
        cls: type[CloudFormationModel], name: str, described: Properties, account: str, region: str, **_: Any
    ) -> CloudFormationModel:
        made = cls()
        made.physical_resource_id, made.attributes = make(name.lower(), dict(described["Properties"]))
        made.type = kind
        return made

    def attribute(self: Any, name: str) -> Any:
        return self.attributes[name]

    type(
        kind.replace("::", ""),
        (CloudFormationModel,),
        {
            "cloudformation_type": staticmethod(lambda: kind),
            "cloudformation_name_type": staticmethod(lambda: ""),
            "create_from_cloudformation_json": classmethod(create),
            "get_cfn_attribute": attribute,
            "delete": lambda self, account, region: None,
        },
    )


def _call(service: str, operation: str, **parameters: Any) -> dict[str, Any]:
    client = boto3.client(service, "us-east-1")
    answer: dict[str, Any] = getattr(client, operation)(**_typed(client, operation, parameters))
    return answer


def _check(service: str, operation: str, **parameters: Any) -> None:
    client = boto3.client(service, "us-east-1")
    shape = _input(client, operation)
    validate_parameters(_typed(client, operation, parameters), shape)


def _typed(client: Any, operation: str, parameters: Properties) -> Properties:
    typed: Properties = _as(_input(client, operation), parameters)
    return typed


def _input(client: Any, operation: str) -> Any:
    return client.meta.service_model.operation_model(client.meta.method_to_api_mapping[operation]).input_shape


def _as(shape: Shape, value: Any) -> Any:
    """CloudFormation turns text into the type that the API wants."""
    match shape.type_name:
        case "structure":
            return {
                key: _as(shape.members[key], inner) if key in shape.members else inner for key, inner in value.items()
            }
        case "list":
            return [_as(shape.member, inner) for inner in value]
        case "integer" | "long":
            return int(value)
        case "boolean":
            return value in (True, "true")
        case _:
            return value


def _bucket_policy(name: str, given: Properties) -> Made:
    _call("s3", "put_bucket_policy", Bucket=given["Bucket"], Policy=json.dumps(given["PolicyDocument"]))
    return name, {}


def _file_system(name: str, given: Properties) -> Made:
    made = _call("fsx", "create_file_system", **given)["FileSystem"]
    return made["FileSystemId"], {
        "DNSName": made["DNSName"],
        "LustreMountName": made["LustreConfiguration"].get("MountName", "fsxmount"),
    }


def _link(name: str, given: Properties) -> Made:
    _check("fsx", "create_data_repository_association", **given)
    return f"dra-{name}", {}


def _cache_subnets(name: str, given: Properties) -> Made:
    _call(
        "elasticache",
        "create_cache_subnet_group",
        CacheSubnetGroupName=name,
        CacheSubnetGroupDescription=given["Description"],
        SubnetIds=given["SubnetIds"],
    )
    return name, {}


def _cache_parameters(name: str, given: Properties) -> Made:
    values = [{"ParameterName": key, "ParameterValue": value} for key, value in given.pop("Properties").items()]
    _check("elasticache", "create_cache_parameter_group", CacheParameterGroupName=name, **given)
    _check("elasticache", "modify_cache_parameter_group", CacheParameterGroupName=name, ParameterNameValues=values)
    return name, {}


def _cache_user(name: str, given: Properties) -> Made:
    return _call("elasticache", "create_user", **given)["UserId"], {}


def _cache_users(name: str, given: Properties) -> Made:
    _check("elasticache", "create_user_group", **given)
    return given["UserGroupId"], {}


def _cache(name: str, given: Properties) -> Made:
    group = name[:40].rstrip("-")
    made = _call("elasticache", "create_replication_group", ReplicationGroupId=group, **given)["ReplicationGroup"]
    endpoint = made["ConfigurationEndpoint"]
    return group, {
        "ConfigurationEndPoint.Address": endpoint["Address"],
        "ConfigurationEndPoint.Port": str(endpoint["Port"]),
    }


def _secret(name: str, given: Properties) -> Made:
    wanted = given.pop("GenerateSecretString")
    password = _call("secretsmanager", "get_random_password", **wanted)["RandomPassword"]
    return _call("secretsmanager", "create_secret", Name=name, SecretString=password, **given)["ARN"], {}


def _egress(name: str, given: Properties) -> Made:
    group, target = given.pop("GroupId"), given.pop("DestinationSecurityGroupId")
    pair = {"GroupId": target, "Description": given.pop("Description")}
    _call(
        "ec2", "authorize_security_group_egress", GroupId=group, IpPermissions=[{**given, "UserIdGroupPairs": [pair]}]
    )
    return name, {}


def _placement_group(name: str, given: Properties) -> Made:
    _check("ec2", "create_placement_group", GroupName=name, **given)
    return name, {}


def _hyperpod(name: str, given: Properties) -> Made:
    groups = [{"ThreadsPerCore": 1, **group} for group in given.pop("InstanceGroups")]  # moto can't do without
    arn = _call("sagemaker", "create_cluster", InstanceGroups=groups, **given)["ClusterArn"]
    return arn, {"ClusterArn": arn}


_TYPES: dict[str, Callable[[str, Properties], Made]] = {
    "AWS::S3::BucketPolicy": _bucket_policy,
    "AWS::FSx::FileSystem": _file_system,
    "AWS::FSx::DataRepositoryAssociation": _link,
    "AWS::ElastiCache::SubnetGroup": _cache_subnets,
    "AWS::ElastiCache::ParameterGroup": _cache_parameters,
    "AWS::ElastiCache::User": _cache_user,
    "AWS::ElastiCache::UserGroup": _cache_users,
    "AWS::ElastiCache::ReplicationGroup": _cache,
    "AWS::SecretsManager::Secret": _secret,
    "AWS::EC2::SecurityGroupEgress": _egress,
    "AWS::EC2::PlacementGroup": _placement_group,
    "AWS::SageMaker::Cluster": _hyperpod,
}
