{{- define "expertmesh.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 30 | trimSuffix "-" -}}
{{- end -}}

{{/* KubeRay takes 47 characters for a RayService, and builds longer names from it. */}}
{{- define "expertmesh.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 47 | trimSuffix "-" -}}
{{- else if contains (include "expertmesh.name" .) .Release.Name -}}
{{- .Release.Name | trunc 47 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name (include "expertmesh.name" .) | trunc 47 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "expertmesh.serviceAccountName" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "expertmesh.fullname" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- default "default" .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{- define "expertmesh.secretName" -}}
{{- default (printf "%s-cluster" (include "expertmesh.fullname" .)) .Values.clusterSecret.existingSecret -}}
{{- end -}}

{{- define "expertmesh.valkeyName" -}}
{{- printf "%s-valkey" (include "expertmesh.fullname" .) -}}
{{- end -}}

{{- define "expertmesh.valkeySecretName" -}}
{{- default (include "expertmesh.valkeyName" .) .Values.valkey.existingSecret -}}
{{- end -}}

{{- define "expertmesh.serveServiceName" -}}
{{- printf "%s-serve-svc" (include "expertmesh.fullname" .) -}}
{{- end -}}

{{- define "expertmesh.chart" -}}
{{- printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" -}}
{{- end -}}

{{/* Labels that never change, for selectors. */}}
{{- define "expertmesh.selectorLabels" -}}
app.kubernetes.io/name: {{ include "expertmesh.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{/* For pods: without the chart's version, so that a new chart alone makes no new Ray cluster. */}}
{{- define "expertmesh.podLabels" -}}
{{ include "expertmesh.selectorLabels" . }}
{{- with .Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "expertmesh.labels" -}}
{{ include "expertmesh.podLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ include "expertmesh.chart" . }}
{{- end -}}

{{/* Image of a pod. Takes a dict: root, accelerator, image (empty: the chart's). */}}
{{- define "expertmesh.image" -}}
{{- $image := .root.Values.image -}}
{{- $tag := default (printf "%s-%s" .root.Chart.AppVersion .accelerator) $image.tag -}}
{{- default (printf "%s:%s" $image.repository $tag) .image -}}
{{- end -}}

{{- define "expertmesh.pullSecrets" -}}
{{- with .Values.image.pullSecrets -}}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
{{- end -}}
