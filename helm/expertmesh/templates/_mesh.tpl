{{/* The mesh's configuration with what a cluster needs, as YAML. What the user set is kept. */}}
{{- define "expertmesh.mesh" -}}
{{- $mesh := deepCopy .Values.mesh -}}
{{- $routing := default dict $mesh.routing -}}
{{- if not (hasKey $routing "bind_host") }}{{ $_ := set $routing "bind_host" "auto" }}{{ end -}}
{{- if not (hasKey $routing "secret_file") -}}
{{- $_ := set $routing "secret_file" (printf "/etc/expertmesh/secret/%s" .Values.clusterSecret.key) -}}
{{- end -}}
{{- if and .Values.tls.existingSecret (not (hasKey $routing "tls")) -}}
{{- $folder := "/etc/expertmesh/tls" -}}
{{- $_ := set $routing "tls" (dict "cert_file" (printf "%s/tls.crt" $folder) "key_file" (printf "%s/tls.key" $folder) "ca_file" (printf "%s/ca.crt" $folder)) -}}
{{- end -}}
{{- $_ := set $mesh "routing" $routing -}}
{{- if .Values.apiKeys.existingSecret -}}
{{- $ingress := default dict $mesh.ingress -}}
{{- if not (hasKey $ingress "keys_file") -}}
{{- $_ := set $ingress "keys_file" (printf "/etc/expertmesh/api-keys/%s" .Values.apiKeys.key) -}}
{{- end -}}
{{- $_ := set $mesh "ingress" $ingress -}}
{{- end -}}
{{- if include "expertmesh.kvStoreSecretName" . -}}
{{- $store := default dict $mesh.kv_store -}}
{{- if .Values.kvStore.useValkey }}{{ $_ := set $store "url" (printf "redis://%s:6379" (include "expertmesh.valkeyName" .)) }}{{ end -}}
{{- $_ := set $store "password_file" "/etc/expertmesh/kv-store/password" -}}
{{- $_ := set $mesh "kv_store" $store -}}
{{- end -}}
{{- range $side := include "expertmesh.sides" . | splitList " " -}}
{{- $section := default dict (get $mesh $side) -}}
{{- $resources := default dict $section.resources -}}
{{- $_ := set $resources (printf "expertmesh_%s" $side) 1 -}}
{{- $_ := set $section "resources" $resources -}}
{{- $_ := set $mesh $side $section -}}
{{- end -}}
{{- toYaml $mesh -}}
{{- end -}}

{{/* Secret with the password of the KV store; empty: it has none. */}}
{{- define "expertmesh.kvStoreSecretName" -}}
{{- if .Values.kvStore.useValkey }}{{ include "expertmesh.valkeySecretName" . }}{{ else }}{{ .Values.kvStore.existingSecret }}{{ end -}}
{{- end -}}

{{/* Fails for a KV store that can't be what the values say. */}}
{{- define "expertmesh.checkStore" -}}
{{- $url := dig "kv_store" "url" "off" .Values.mesh | toString -}}
{{- if or (eq $url "embedded") (hasPrefix "unix:" $url) -}}
{{- fail (printf "mesh.kv_store.url: %s is on one machine; name a server, or use kvStore.useValkey" $url) -}}
{{- end -}}
{{- with .Values.kvStore -}}
{{- if .useValkey -}}
{{- $policy := $.Values.valkey.maxMemoryPolicy -}}
{{- if not $.Values.valkey.enabled }}{{ fail "kvStore.useValkey: needs valkey.enabled" }}{{ end -}}
{{- if not (has $url (list "off" "false")) }}{{ fail (printf "kvStore.useValkey: mesh.kv_store.url is %s already" $url) }}{{ end -}}
{{- if .existingSecret }}{{ fail "kvStore.existingSecret: the chart's Valkey has a password already; it is for a server of your own" }}{{ end -}}
{{- if eq $policy "noeviction" }}{{ fail "valkey.maxMemoryPolicy: noeviction takes no new KV blocks when memory is full; use volatile-lru" }}{{ end -}}
{{- if and (hasPrefix "allkeys" $policy) $.Values.ray.gcsFaultTolerance.enabled (not $.Values.ray.gcsFaultTolerance.externalAddress) -}}
{{- fail (printf "valkey.maxMemoryPolicy: %s would drop the head's state; use volatile-lru" $policy) -}}
{{- end -}}
{{- else if and .existingSecret (has $url (list "off" "false")) -}}
{{- fail "kvStore.existingSecret: a password without a store; set mesh.kv_store.url" -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* Sides that the mesh has replicas of. */}}
{{- define "expertmesh.sides" -}}
{{- if eq (dig "experts" "mode" "mesh" .Values.mesh) "colocated" -}}attention{{- else -}}attention experts{{- end -}}
{{- end -}}

{{/* What Ray Serve deploys. */}}
{{- define "expertmesh.serveConfig" -}}
proxy_location: EveryNode
http_options:
  host: 0.0.0.0
  port: 8000
logging_config:
  log_level: {{ dig "telemetry" "log_level" "warning" .Values.mesh | upper }}
  encoding: JSON
applications:
  - name: expertmesh
    import_path: expertmesh.deployments:build_app
    route_prefix: /
    args:
      mesh:
        {{- include "expertmesh.mesh" . | nindent 8 }}
{{- end -}}

{{/* Worker groups with their defaults, as YAML: those that are enabled and whose side the mesh has. */}}
{{- define "expertmesh.groups" -}}
{{- $sides := include "expertmesh.sides" . | splitList " " -}}
{{- $groups := dict -}}
{{- range $name, $own := .Values.workerGroups -}}
{{- $group := mergeOverwrite (deepCopy $.Values.workerDefaults) (deepCopy (default dict $own)) -}}
{{- if and $own $group.enabled (has $group.side $sides) }}{{ $_ := set $groups $name $group }}{{ end -}}
{{- end -}}
{{- toYaml $groups -}}
{{- end -}}

{{/* Fails for groups that can't hold the mesh, with what is missing. */}}
{{- define "expertmesh.checkGroups" -}}
{{- $groups := include "expertmesh.groups" . | fromYaml -}}
{{- $colocated := eq (include "expertmesh.sides" .) "attention" -}}
{{- range $name, $group := $groups -}}
{{- if and (eq $group.accelerator "gpu") (lt (int $group.gpus) 1) -}}
{{- fail (printf "workerGroups.%s.gpus: 0, but its accelerator is gpu" $name) -}}
{{- end -}}
{{- if and (ne $group.accelerator "gpu") (gt (int $group.gpus) 0) -}}
{{- fail (printf "workerGroups.%s.accelerator: %s, but it asks for %d GPUs; use gpu" $name $group.accelerator (int $group.gpus)) -}}
{{- end -}}
{{- if and (eq $group.accelerator "neuron") (lt (int $group.neuronCores) 1) -}}
{{- fail (printf "workerGroups.%s.neuronCores: 0, but its accelerator is neuron" $name) -}}
{{- end -}}
{{- if and (eq $group.accelerator "neuron") (not $colocated) -}}
{{- fail (printf "workerGroups.%s.accelerator: neuron needs mesh.experts.mode: colocated, because its compiler takes whole graphs" $name) -}}
{{- end -}}
{{- $section := default dict (get $.Values.mesh $group.side) -}}
{{- $kinds := list (list "cpus" "CPUs" (dig "cpus" 0.5 $section) $group.cpus) (list "gpus" "GPUs" (dig "gpus" 0 $section) $group.gpus) (list "neuronCores" "neuron_cores" (dig "resources" "neuron_cores" 0 $section) $group.neuronCores) -}}
{{- range $kinds -}}
{{- $all := mulf (index . 2 | toString | float64) (float64 $group.slots) -}}
{{- if gt $all (float64 (index . 3)) -}}
{{- fail (printf "workerGroups.%s.%s: %v, but its slots need %v (%v slots x %v %s a replica)" $name (index . 0) (index . 3) $all $group.slots (index . 2) (index . 1)) -}}
{{- end -}}
{{- end -}}
{{- if gt (int $group.minReplicas) (int $group.maxReplicas) -}}
{{- fail (printf "workerGroups.%s.minReplicas: %d is more than maxReplicas (%d)" $name (int $group.minReplicas) (int $group.maxReplicas)) -}}
{{- end -}}
{{- end -}}
{{- range $side := include "expertmesh.sides" . | splitList " " -}}
{{- $needed := 1 -}}
{{- if eq $side "experts" -}}
{{- $needed = dig "experts" "shards" 2 $.Values.mesh | int -}}
{{- $scaling := dig "autoscaling" "experts" dict $.Values.mesh -}}
{{- if $scaling }}{{ $needed = int $scaling.max_shards }}{{ end -}}
{{- else -}}
{{- $needed = dig "attention" "replicas" 1 $.Values.mesh | int -}}
{{- $scaling := dig "autoscaling" "attention" dict $.Values.mesh -}}
{{- if $scaling }}{{ $needed = int $scaling.max_replicas }}{{ end -}}
{{- end -}}
{{- $room := 0 -}}
{{- range $groups }}{{ if eq .side $side }}{{ $room = add $room (mul (int .slots) (int .maxReplicas)) }}{{ end }}{{ end -}}
{{- if lt (int $room) $needed -}}
{{- fail (printf "workerGroups: the mesh has up to %d %s replicas, but its groups hold %d (slots x maxReplicas)" $needed $side (int $room)) -}}
{{- end -}}
{{- end -}}
{{- end -}}
